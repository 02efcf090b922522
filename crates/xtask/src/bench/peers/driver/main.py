"""One peer's process: does the work that is asked for on stdin, a line of JSON each, and answers each with a line.

    python main.py torch|compiled|llama|openvino MODEL_FOLDER f32|bf16|int8|int4 THREADS

Work is {"what": "prefill", "tokens"}, {"what": "decode", "batch", "context", "tokens"}, {"what": "train", "full", "rows",
"length", "steps"} or {"what": "first"} (one token after a short prompt, timed by who asks). An answer is {"rate": tokens/s}
or {"error": text}; before the first comes {"imports": seconds}. Prompts are random, so that no cache of prefixes helps.
"""

import importlib
import json
import pathlib
import sys
import time

MODULES = {"torch": "with_torch", "compiled": "with_torch", "llama": "with_llama", "openvino": "with_openvino"}


def main() -> None:
    begun = time.perf_counter()
    name, folder, precision, threads = sys.argv[1:5]
    module = importlib.import_module(MODULES[name])
    tell({"imports": time.perf_counter() - begun})
    peer = module.Peer(pathlib.Path(folder), precision, int(threads), compiled=name == "compiled")
    for line in sys.stdin:
        work = json.loads(line)
        what = work.pop("what")
        try:
            tell({"rate": peer.decode(1, 16, 1) if what == "first" else getattr(peer, what)(**work)})
        except Exception as error:  # Told to who asks: the other rows go on.
            tell({"error": f"{type(error).__name__}: {error}"})


def tell(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


main()
