"""Tests of the plugin for vLLM, in an environment that has it: `make serving`."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
