"""vLLM in processes of their own, as the tests and the benchmark of serving start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
WITHOUT = {"VLLM_PLUGINS": ""}  # vLLM loads no plugin


class Engine:
    """`generate.py` with the arguments of `vllm.LLM`; a context."""

    def __init__(self, model: Path, log: Path, environment=None, **options) -> None:
        options = {"dtype": "float32", "max_loras": 3, "max_lora_rank": 16} | options
        alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options.get("tensor_parallel_size", 1) == 1 else {}
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("generate.py"), json.dumps({"model": str(model)} | options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | ENVIRONMENT | alone | (environment or {}),
            )
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with {self.process.wait()}:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def _command(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def load(self, adapter) -> str | None:
        """Load an adapter; why it was refused, or None."""
        return self._command(load=adapter)

    def ask(self, requests, **sampling):
        """Tokens and their logarithms of probabilities for each `[prompt, adapter]`, all in one batch."""
        return self._command(ask=requests, sampling=sampling)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=120)
