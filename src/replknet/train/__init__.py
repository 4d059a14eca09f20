"""What all trainings share: a recipe, the hardware, and a Lightning Trainer that turns a job into a folder."""
