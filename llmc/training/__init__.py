"""What llmc.train is made of: settings, setup, the loop, its step, and what watches over them."""
