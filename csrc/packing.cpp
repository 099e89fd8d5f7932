#include "packing.hpp"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

#include "integer_set.hpp"

namespace tropd {
namespace {

using Ints = std::vector<int64_t>;
using Ranks = std::vector<int32_t>;  // per sequence: half the memory traffic, and lengths and counts fit

// Above this share of all room the even spread nearly always fails; trying it would only cost time.
constexpr int64_t kSpreadNumerator = 31, kSpreadDenominator = 32;
// Replicas are called equal when the heaviest and the lightest differ by less than this share of the heaviest.
constexpr int64_t kBalanceDenominator = 1000;
constexpr int64_t kTrialsPerReplica = 16;

// Sequence indices, longest first, equal lengths by id: this is what makes the answer independent of input order.
Ints longest_first(const int64_t* lengths, const int64_t* ids, std::size_t n) {
  Ints by_id(n);
  std::iota(by_id.begin(), by_id.end(), 0);
  if (!std::is_sorted(ids, ids + n)) {
    std::sort(by_id.begin(), by_id.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
  const int64_t longest = *std::max_element(lengths, lengths + n);
  Ints next(longest + 2, 0);  // counting sort: lengths are bounded by the number of tokens, which fit in memory
  for (std::size_t i = 0; i < n; ++i) ++next[longest - lengths[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  Ints sorted(n);
  for (const int64_t i : by_id) sorted[next[longest - lengths[i]]++] = i;
  return sorted;
}

// The plan while it is being made. Sequences are known by their rank (0 is the longest).
struct Plan {
  int64_t capacity;
  Ranks length;                   // per rank
  Ints work_of;                   // per rank
  Ranks pack_of;                  // per rank
  Ints pack_work, free, members;  // per pack
  Ints replica_of;                // per pack
  Ints load;                      // per replica

  int64_t work(std::size_t rank) const { return work_of[rank]; }
  int64_t num_packs() const { return static_cast<int64_t>(free.size()); }

  void reset_packs(int64_t count) {
    pack_work.assign(count, 0);
    free.assign(count, capacity);
    members.assign(count, 0);
  }

  int64_t open_pack() {
    pack_work.push_back(0);
    free.push_back(capacity);
    members.push_back(0);
    return num_packs() - 1;
  }

  void put(std::size_t rank, int64_t pack) {
    pack_of[rank] = static_cast<int32_t>(pack);
    pack_work[pack] += work(rank);
    free[pack] -= length[rank];
    members[pack] += 1;
  }

  void move(std::size_t rank, int64_t pack) {
    const int64_t from = pack_of[rank];
    pack_work[from] -= work(rank);
    free[from] += length[rank];
    members[from] -= 1;
    put(rank, pack);
  }
};

// Best-fit decreasing: the pack with the least sufficient room, the one touched last when several have the same room.
void best_fit(Plan& plan, int64_t total) {
  // More room than all tokens together changes nothing but the size of the tables.
  const int64_t most_room = std::min(plan.capacity, total);
  IntegerSet rooms(most_room + 1);
  Ints top(most_room + 1, -1), below;  // packs with the same room form a stack
  for (std::size_t rank = 0; rank < plan.length.size(); ++rank) {
    int64_t room = rooms.at_least(plan.length[rank]);
    int64_t pack;
    if (room < 0) {
      room = most_room;
      pack = plan.open_pack();
      below.push_back(-1);
    } else {
      pack = top[room];
      top[room] = below[pack];
      if (top[room] < 0) rooms.erase(room);
    }
    plan.put(rank, pack);
    room -= plan.length[rank];
    below[pack] = top[room];
    if (top[room] < 0) rooms.insert(room);
    top[room] = pack;
  }
}

// Longest first into the pack of least work that has room. Returns the pack of every rank, or nothing when a sequence
// fits nowhere.
Ranks spread(const Plan& plan, int64_t count) {
  using Entry = std::pair<int64_t, int64_t>;
  using Heap = std::priority_queue<Entry, std::vector<Entry>, std::greater<>>;
  Ints work(count, 0), free(count, plan.capacity);
  Heap open;    // (work, pack), least work on top
  Heap parked;  // (-room, pack), too full at the moment
  Ranks pack_of(plan.length.size());
  for (int64_t pack = 0; pack < count; ++pack) open.emplace(0, pack);
  for (std::size_t rank = 0; rank < plan.length.size(); ++rank) {
    const int64_t length = plan.length[rank];
    for (; !parked.empty() && -parked.top().first >= length; parked.pop()) {
      open.emplace(work[parked.top().second], parked.top().second);
    }
    for (; !open.empty() && free[open.top().second] < length; open.pop()) {
      parked.emplace(-free[open.top().second], open.top().second);
    }
    if (open.empty()) return {};
    const int64_t pack = open.top().second;
    open.pop();
    pack_of[rank] = static_cast<int32_t>(pack);
    work[pack] += plan.work(rank);
    free[pack] -= length;
    open.emplace(work[pack], pack);
  }
  return pack_of;
}

// Opens one pack more and gives it every second sequence of the pack with most work; empty when none can be split.
void split_heaviest(Plan& plan) {
  int64_t heaviest = -1;
  for (int64_t pack = 0; pack < plan.num_packs(); ++pack) {
    if (plan.members[pack] < 2) continue;
    if (heaviest < 0 || plan.pack_work[pack] > plan.pack_work[heaviest]) heaviest = pack;
  }
  const int64_t fresh = plan.open_pack();
  bool odd = false;
  for (std::size_t rank = 0; heaviest >= 0 && rank < plan.length.size(); ++rank) {
    if (plan.pack_of[rank] != heaviest) continue;
    if (odd) plan.move(rank, fresh);
    odd = !odd;
  }
}

// The same sequences in exactly `count` packs, as even as the room allows.
void open_packs(Plan& plan, int64_t count, int64_t total) {
  const int64_t room = count * std::min(plan.capacity, total);
  const bool loose = total * kSpreadDenominator <= room * kSpreadNumerator;
  const Ranks pack_of = loose ? spread(plan, count) : Ranks{};
  if (!pack_of.empty()) {
    plan.reset_packs(count);
    for (std::size_t rank = 0; rank < pack_of.size(); ++rank) plan.put(rank, pack_of[rank]);
  }
  while (plan.num_packs() < count) split_heaviest(plan);
}

Ints heaviest_first(const Plan& plan) {
  Ints packs(plan.free.size());
  std::iota(packs.begin(), packs.end(), 0);
  std::stable_sort(packs.begin(), packs.end(),
                   [&](int64_t a, int64_t b) { return plan.pack_work[a] > plan.pack_work[b]; });
  return packs;
}

Ints lightest_replicas_first(const Plan& plan) {
  Ints replicas(plan.load.size());
  std::iota(replicas.begin(), replicas.end(), 0);
  std::stable_sort(replicas.begin(), replicas.end(), [&](int64_t a, int64_t b) { return plan.load[a] < plan.load[b]; });
  return replicas;
}

// Rounds of one pack per replica, packs of most work first: in each round the lightest replica takes the heaviest pack.
void deal(Plan& plan, int64_t num_replicas) {
  const Ints packs = heaviest_first(plan);
  plan.load.assign(num_replicas, 0);
  plan.replica_of.assign(packs.size(), 0);
  for (std::size_t first = 0; first < packs.size(); first += num_replicas) {
    const Ints replicas = lightest_replicas_first(plan);
    for (std::size_t i = 0; i < replicas.size(); ++i) {
      plan.replica_of[packs[first + i]] = replicas[i];
      plan.load[replicas[i]] += plan.pack_work[packs[first + i]];
    }
  }
}

// A transfer of work between two replicas; the best one moves half their gap.
struct Transfer {
  int64_t gap;
  int64_t miss;        // |2 * moved work - gap|, smaller is better
  int64_t rank = -1;   // a sequence that moves, or
  int64_t give = -1;   // a pack that is exchanged
  int64_t take = -1;   // for the pack of the other replica (or: the pack that receives the sequence)

  explicit Transfer(int64_t gap_) : gap(gap_), miss(gap_) {}
  bool found() const { return take >= 0; }
  // A miss below the gap is the same as a moved amount strictly between nothing and the gap.
  bool better(int64_t moved) const { return std::abs(2 * moved - gap) < miss; }
};

// Exchange of two whole packs, which is always possible.
void consider_exchanges(const Plan& plan, int64_t heavy, int64_t light, Transfer& best) {
  std::vector<std::pair<int64_t, int64_t>> offers;  // (work, pack) of the light replica
  for (std::size_t pack = 0; pack < plan.free.size(); ++pack) {
    if (plan.replica_of[pack] == light) offers.emplace_back(plan.pack_work[pack], pack);
  }
  std::sort(offers.begin(), offers.end());
  for (std::size_t give = 0; give < plan.free.size(); ++give) {
    if (plan.replica_of[give] != heavy) continue;
    const int64_t wanted = plan.pack_work[give] - best.gap / 2;
    const auto by_work = [](const auto& offer, int64_t work) { return offer.first < work; };
    const auto above = std::lower_bound(offers.begin(), offers.end(), wanted, by_work) - offers.begin();
    for (auto at = std::max<std::ptrdiff_t>(above - 1, 0); at <= above && at < static_cast<std::ptrdiff_t>(offers.size()); ++at) {
      const int64_t moved = plan.pack_work[give] - offers[at].first;
      if (!best.better(moved)) continue;
      best.miss = std::abs(2 * moved - best.gap);
      best.give = static_cast<int64_t>(give);
      best.take = offers[at].second;
    }
  }
}

// Move of one sequence into the roomiest pack of the light replica; a pack is never emptied by it.
void consider_moves(const Plan& plan, int64_t heavy, int64_t light, Transfer& best) {
  int64_t roomiest = -1;
  for (std::size_t pack = 0; pack < plan.free.size(); ++pack) {
    if (plan.replica_of[pack] != light) continue;
    if (roomiest < 0 || plan.free[pack] > plan.free[roomiest]) roomiest = static_cast<int64_t>(pack);
  }
  for (std::size_t rank = 0; rank < plan.length.size(); ++rank) {
    const int64_t from = plan.pack_of[rank];
    if (plan.replica_of[from] != heavy || plan.members[from] < 2) continue;
    if (plan.length[rank] > plan.free[roomiest] || !best.better(plan.work(rank))) continue;
    best.miss = std::abs(2 * plan.work(rank) - best.gap);
    best.rank = static_cast<int64_t>(rank);
    best.take = roomiest;
  }
}

void apply(Plan& plan, int64_t heavy, int64_t light, const Transfer& transfer) {
  int64_t moved = 0;
  if (transfer.rank >= 0) {
    moved = plan.work(transfer.rank);
    plan.move(transfer.rank, transfer.take);
  } else {
    moved = plan.pack_work[transfer.give] - plan.pack_work[transfer.take];
    std::swap(plan.replica_of[transfer.give], plan.replica_of[transfer.take]);
  }
  plan.load[heavy] -= moved;
  plan.load[light] += moved;
}

// Relieves the heaviest replica, first in favor of the lightest, until they are equal or nothing helps.
void rebalance(Plan& plan) {
  int64_t trials = kTrialsPerReplica * static_cast<int64_t>(plan.load.size());
  for (bool improved = true; improved;) {
    improved = false;
    const Ints replicas = lightest_replicas_first(plan);
    const int64_t heavy = replicas.back();
    for (const int64_t light : replicas) {
      const int64_t gap = plan.load[heavy] - plan.load[light];
      if (gap <= plan.load[heavy] / kBalanceDenominator || trials-- <= 0) break;
      Transfer best(gap);
      consider_exchanges(plan, heavy, light, best);
      consider_moves(plan, heavy, light, best);
      if (!best.found()) continue;
      apply(plan, heavy, light, best);
      improved = true;
      break;
    }
  }
}

// Packs by replica, most work first; sequences of a pack by rank.
Assignment number_packs(const Plan& plan, const Ints& sorted) {
  Ints packs = heaviest_first(plan);
  std::stable_sort(packs.begin(), packs.end(),
                   [&](int64_t a, int64_t b) { return plan.replica_of[a] < plan.replica_of[b]; });
  Assignment result;
  result.order.resize(sorted.size());
  result.pack_offsets.assign(packs.size() + 1, 0);
  Ints next(packs.size());
  for (std::size_t i = 0; i < packs.size(); ++i) {
    next[packs[i]] = result.pack_offsets[i];
    result.pack_offsets[i + 1] = result.pack_offsets[i] + plan.members[packs[i]];
  }
  for (std::size_t rank = 0; rank < sorted.size(); ++rank) result.order[next[plan.pack_of[rank]]++] = sorted[rank];
  return result;
}

}  // namespace

Assignment assign_items(const int64_t* sizes, const int64_t* works, const int64_t* ids, std::size_t n, int64_t capacity,
                        int64_t num_replicas) {
  const Ints sorted = longest_first(sizes, ids, n);
  Plan plan{capacity, Ranks(n), Ints(n), Ranks(n), {}, {}, {}, {}, {}};
  for (std::size_t rank = 0; rank < n; ++rank) {
    plan.length[rank] = static_cast<int32_t>(sizes[sorted[rank]]);
    plan.work_of[rank] = works[sorted[rank]];
  }
  const int64_t total = std::accumulate(sizes, sizes + n, int64_t{0});
  best_fit(plan, total);
  const int64_t rounds = (plan.num_packs() + num_replicas - 1) / num_replicas;
  if (num_replicas > 1) open_packs(plan, rounds * num_replicas, total);
  deal(plan, num_replicas);
  rebalance(plan);
  return number_packs(plan, sorted);
}

Assignment assign_packs(const int64_t* lengths, const int64_t* ids, std::size_t n, int64_t capacity,
                        int64_t num_replicas, int64_t linear_work) {
  Ints works(n);
  for (std::size_t i = 0; i < n; ++i) works[i] = lengths[i] * (linear_work + lengths[i]);
  return assign_items(lengths, works.data(), ids, n, capacity, num_replicas);
}

}  // namespace tropd
