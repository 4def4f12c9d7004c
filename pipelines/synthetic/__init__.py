"""Tasks of token ids that are generated, not read: state tracking and associative recall."""

from pipelines.synthetic.groups import Group, group
from pipelines.synthetic.recall import MQAR
from pipelines.synthetic.task import TASKS, Example, Task, TaskDataset, make_task
from pipelines.synthetic.tracking import StateTracking

__all__ = [
    "MQAR",
    "TASKS",
    "Example",
    "Group",
    "StateTracking",
    "Task",
    "TaskDataset",
    "group",
    "make_task",
]
