"""Says before a run starts how much memory each rank needs, how long a step takes, and which layouts fit."""
