"""Code in a process of its own that has imported PEFT, and nothing of this package.

    with Fresh() as fresh:
        run = fresh("import sys, spikelora; print(sys.argv)", folder)

The processes are forked from one new interpreter, as the import of PEFT takes seconds.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# A fork ends as a script does: with what it raised and its status.
INTERPRETER = """
import json, os, sys
import peft
for line in sys.stdin:
    code, arguments, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["-c", *arguments]
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Fresh:
    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.interpreter = subprocess.Popen([sys.executable, "-c", INTERPRETER], text=True, **pipes)
        return self

    def __exit__(self, *raised):
        self.interpreter.communicate()

    def __call__(self, code, *arguments):
        """The process that has ended, with what it said."""
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder) / name for name in ("stdout", "stderr")]
            asked = [code, [str(argument) for argument in arguments], *map(str, said)]
            print(json.dumps(asked), file=self.interpreter.stdin, flush=True)
            status = int(self.interpreter.stdout.readline())
            return subprocess.CompletedProcess(code, status, *(file.read_text() for file in said))
