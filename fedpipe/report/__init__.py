"""What a run tells about itself: records, console, figures and documents."""
