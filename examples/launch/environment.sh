#!/usr/bin/env bash
# Sourced by the scripts that start ranks: what Megatron, NCCL and Triton want of the environment. What is set already stays.
#
#   INTERFACE  network interface between the machines, such as ib0 or eth1, where the libraries choose another

# kernels of one device start in the order in which they are issued: Megatron lets communication go first that way
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# packs differ in length, and what offloading gives back is taken again: fixed segments would be left in pieces
[ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# on the machine itself: every rank compiles, and homes are often on a network file system
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/tropd-triton-$(id -u)}"
if [ -n "${INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}"
fi
