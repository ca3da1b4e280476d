"""Every task of the evaluation, one after the other, then the summary.

    python examples/paper/all.py                        # hours on two cores; what is there already is not done again
    python examples/paper/all.py --tasks mnist,concrete
    python examples/paper/all.py --quick                # miniatures of all, to see them work

Each task runs in a process of its own, so that one that fails (data that cannot be had, say) leaves the others alone.
"""

import subprocess
import sys
from pathlib import Path

from _problem import parser

HERE = Path(__file__).parent
TASKS = [
    "concrete", "concrete_noise", "concrete_linear", "concrete_linear --optimal", "parkinsons", "pima_logistic",
    "pima_logistic --optimal", "mnist", "fashion_mnist", "fashion_mnist_noise", "rotated_mnist", "rotated_digits",
    "pacs", "cifar10", "fashion_mnist_adamw", "fashion_mnist_adamw_noise", "rte", "qnli", "wikitext2",
    "wikitext2_letters", "shakespeare", "shakespeare_words",
]  # fmt: skip


def main() -> None:
    """Run what was asked for; exit with the number of tasks that failed."""
    found = parser(__doc__ or "")
    found.add_argument("--tasks", default=",".join(TASKS), help="which, separated by commas")
    found.add_argument("--again", action="store_true", help="also tasks that have results already")
    options = found.parse_args()
    shared = ["--data", options.data, "--cache", options.cache, "--results", options.results]
    shared += [f"--{name}" for name in ("full", "quick") if getattr(options, name)]
    shared += ["--device", options.device] if options.device else []
    failed = []
    for task in options.tasks.split(","):
        name, *more = task.split()
        result = options.results / f"{name}{'_optimal' if more else ''}.csv"
        if result.exists() and not options.again and not options.quick:
            print(f"{task}: {result} is there", flush=True)
            continue
        print(f"\n== {task}", flush=True)
        done = subprocess.run([sys.executable, HERE / f"{name}.py", *more, *map(str, shared)], check=False)
        failed += [task] if done.returncode else []
    if not options.quick:
        subprocess.run([sys.executable, HERE / "summary.py", "--results", options.results], check=True)
    if failed:
        sys.exit(f"{len(failed)} tasks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
