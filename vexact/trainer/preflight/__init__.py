"""What is found out before the first step: of the settings, the machine, the data and the graders."""
