"""Training of all tasks: recipes, hardware settings, and a Lightning Trainer that runs a job and fills a folder."""
