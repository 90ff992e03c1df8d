"""What `normatch bench` measures, always side by side in one process and after the results have been compared."""
