"""What each section allows, but the whole does not: one file a subject, one small function a rule."""
