"""Models as folders of the Hugging Face hub: saved, described and loaded."""
