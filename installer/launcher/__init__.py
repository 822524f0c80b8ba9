"""What run.py does, standard library only: `.venv`, Debian's libraries, the desktop's menu, the tests."""
