"""The paper's tables again: which runs they need, running them, and the page that compares."""
