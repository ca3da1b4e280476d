"""How well do attribution scores predict retraining? SOURCE and its rivals on Fashion-MNIST.

    python examples/fashion_mnist.py              # two cores: twenty minutes of retraining, then as long for fits
    python examples/fashion_mnist.py --quick      # a miniature, a minute or two

An MLP (784-256-128-10) is trained on 6,000 images. The linear datamodeling score (LDS) asks, for 200 test images: if
the network is retrained on random halves of the images, do the attribution scores, summed over each half, rank the
margins that the retrained networks really have?

This is one of the tasks of examples/paper, whose pipeline does the work: see examples/paper/fashion_mnist.py.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    task = Path(__file__).resolve().parent / "paper" / "fashion_mnist.py"
    sys.path.insert(0, str(task.parent))
    runpy.run_path(str(task), run_name="__main__")
