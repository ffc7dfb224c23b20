"""`recipe-run plan`: memory, time and disk of a run, worked out before anything is downloaded."""
