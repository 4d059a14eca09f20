"""Runnable experiments; `demo` is the main job."""
