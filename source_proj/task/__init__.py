r"""Tasks: what is trained on, and what is measured.

For a training example z a task gives one scalar, the output :math:`o_θ(z)`, and the loss's first two derivatives by
it, so that one backward pass yields every weighting (Park et al. 2023, arXiv 2303.14186): the loss gradient is
:math:`ℓ'(o) ∇o`, the Gauss-Newton term :math:`ℓ''(o) ∇o ∇o^⊤`. For a query q it gives the measurement
:math:`m_θ(q)` that is to be explained. Everything here runs on whole batches and under ``torch.func.vmap(grad)``:
checks of values are left out under ``vmap``.
"""

from source_proj.task.answers import Answer, Answers
from source_proj.task.base import Derivatives, Task
from source_proj.task.batch import Batch, Model, Uniform
from source_proj.task.classification import Classification
from source_proj.task.language import CausalLM
from source_proj.task.regression import Regression
from source_proj.task.tokens import TokenQueries

__all__ = [
    "Answer",
    "Answers",
    "Batch",
    "CausalLM",
    "Classification",
    "Derivatives",
    "Model",
    "Regression",
    "Task",
    "TokenQueries",
    "Uniform",
]
