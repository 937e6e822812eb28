"""The paper's study on real data: LoRA against SpikeLoRA and honest controls, resumable; see README.md."""

import os

# One thread for each run, as runs go side by side; set before anything is imported that reads it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
