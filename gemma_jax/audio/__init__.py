"""From sounds to soft tokens: waveforms, log-mel, the conformer, whole or as a stream."""
