"""From pictures to soft tokens: pre-processing, the SigLIP tower, the way into a prompt."""
