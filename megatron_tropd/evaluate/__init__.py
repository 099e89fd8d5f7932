"""Grading answers to problems: suites, rules, the pool of graders, the sandbox, intervals."""
