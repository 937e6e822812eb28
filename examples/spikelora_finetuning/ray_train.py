"""Fine-tuning on the workers of a Ray cluster: each runs spikelora_finetuning.py's own `main`, with its own flags.

    python ray_train.py --workers 2 --max_steps 20                       # two workers, here
    python ray_train.py --workers 8 --gpu --base_model facebook/opt-350m --output_dir /shared/run

`--workers`, `--gpu` and `--address` are of this script; every other flag is of the other one. Ray Train sets up
torch.distributed in each worker, where accelerate and transformers' Trainer find it. All machines have to share this
folder, the folder where it was started, and the output folder.
"""

import argparse
import os
import sys
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

FOLDER = Path(__file__).resolve().parent


def work(settings: dict) -> None:
    """One worker: the script's `main`, in the process group that Ray has made."""
    os.chdir(settings["start"])  # Ray gives each worker a folder of its own
    sys.path.insert(0, settings["folder"])
    sys.argv = ["spikelora_finetuning.py", *settings["arguments"]]
    from spikelora_finetuning import main

    main()


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a copy of the base model")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each")
    parser.add_argument("--address", help="of a cluster that runs; by default one is started here")
    own, arguments = parser.parse_known_args()
    ray.init(address=own.address)
    TorchTrainer(
        work,
        train_loop_config={"folder": str(FOLDER), "start": os.getcwd(), "arguments": arguments},
        scaling_config=ScalingConfig(num_workers=own.workers, use_gpu=own.gpu),
        run_config=RunConfig(name="spikelora", storage_path=os.path.abspath("outputs/ray")),
    ).fit()


if __name__ == "__main__":
    run()
