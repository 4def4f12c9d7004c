"""What is generated, not read: tasks of token ids (state tracking, associative recall), and sums with responses."""

from pipelines.synthetic import arithmetic
from pipelines.synthetic.arithmetic import Arithmetic
from pipelines.synthetic.groups import Group, group
from pipelines.synthetic.recall import MQAR
from pipelines.synthetic.task import TASKS, Example, Task, TaskDataset, make_task
from pipelines.synthetic.tracking import StateTracking

__all__ = [
    "MQAR",
    "TASKS",
    "Arithmetic",
    "Example",
    "Group",
    "StateTracking",
    "Task",
    "TaskDataset",
    "arithmetic",
    "group",
    "make_task",
]
