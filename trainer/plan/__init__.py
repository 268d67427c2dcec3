"""The planner of a run: what a recipe takes of memory, disk, links and time, and what would make it fit. Pure; reads config files only."""
