"""State tracking: the word problem of a group (arXiv:2404.08819, section 5)."""

import dataclasses
import itertools

import numpy as np

from pipelines.synthetic.groups import Group, group
from pipelines.synthetic.task import TASKS, Example, Task
from zoo.core.registry import check_choice


@TASKS.register("state_tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
    """Inputs x_1 .. x_T, elements of a group; the target at every position is the product so far, x_1 x_2 .. x_t.

    Ids are those of the group's elements, 0 being the identity. The word problem of a group that is not solvable (A5,
    S5) is complete for NC1: if TC0 is smaller, as is believed, no network of constant depth whose tokens are processed
    in parallel solves it at every length. A recurrence that is not linear does so in one layer.

    Args:
      group: name of the group; see `groups.group`.
      inputs: "elements", uniform over the group; "generators", uniform over the identity and a few elements that
        generate the group: fewer products to learn, and the same states.
    """

    group: str = "s5"
    inputs: str = "elements"

    def __post_init__(self):
        super().__post_init__()
        check_choice("inputs", self.inputs, ("elements", "generators"))
        group(self.group)

    @property
    def elements(self) -> Group:
        """The group."""
        return group(self.group)

    @property
    def ids(self) -> int:
        """Elements of the group."""
        return len(self.elements)

    @property
    def answers(self) -> int:
        """Elements of the group."""
        return len(self.elements)

    def draw(self, rng: np.random.Generator, length: int) -> Example:
        """Random inputs and their running products."""
        choices = self.elements.generators if self.inputs == "generators" else range(len(self.elements))
        tokens = np.array(choices)[rng.integers(len(choices), size=length)]
        table = self.elements.table
        products = list(itertools.accumulate(tokens, lambda product, x: table[product, x]))
        return Example(tokens, np.array(products), np.ones(length, bool))
