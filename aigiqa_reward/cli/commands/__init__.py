"""The commands of `aigiqa-reward`, one file each."""
