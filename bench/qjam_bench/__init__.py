"""bin/qjam-bench measures qjam beside its rivals. docs/benchmarks.md explains each figure."""
