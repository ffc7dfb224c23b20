"""After training: answers, evaluation, merging, serving, publishing."""
