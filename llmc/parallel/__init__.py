"""Many processes: who is who, sums over all of them, who has died, and ZeRO-1."""
