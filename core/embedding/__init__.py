"""HiPer and HiFi Tuner (eq. 6 and Algorithm 1): learning a subject as token embeddings."""
