"""Will my model work? `hubsync doctor` finds out by doing it: `trial` makes the change, `exam` has engines make it."""
