"""The benchmark suite, installed as `fastgpt.benchmarks`; `fastgpt bench` is its command line."""
