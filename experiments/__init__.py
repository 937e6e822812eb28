"""The paper's study on real data: LoRA against SpikeLoRA and honest controls, resumable; see README.md."""

import os

# One thread for each run, and runs side by side; before anything is imported that reads it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
