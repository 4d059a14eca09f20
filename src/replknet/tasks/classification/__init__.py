"""Classification: its files, networks, inference, training, export and recipes."""
