"""HiPer and HiFi Tuner, Algorithm 1: learning a subject as token embeddings."""
