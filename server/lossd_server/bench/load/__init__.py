"""`lossd bench --load`: many callers of many kinds at a time, and what became of their calls."""
