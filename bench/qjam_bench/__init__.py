"""qjam measured beside its rivals: what bin/qjam-bench runs. docs/benchmarks.md tells what each figure means."""
