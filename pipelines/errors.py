"""The one error that bad data raises."""


class DataError(ValueError):
    """Bad data: says where it is, what is wrong, and, where there is one, what to do.

    Args:
        reason: the kind of problem in a few words; skipped documents are counted by it.
        origin: file, or file and line or row, that the problem was found at.
        detail: what exactly was seen, and the nearest fix.
    """

    def __init__(self, reason: str, origin: str, detail: str = ""):
        super().__init__(f"{origin}: {reason}" + (f": {detail}" if detail else ""))
        self.reason = reason
        self.origin = origin
        self.detail = detail

    def __reduce__(self):
        return DataError, (self.reason, self.origin, self.detail)
