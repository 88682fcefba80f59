"""Measure how fast gradclip is, and write the tables.

python -m benchmarks.speed            # what is missing, about 20 minutes on two idle cores
python -m benchmarks.speed --quick    # tries every case; the numbers mean nothing
python -m benchmarks.speed report     # the tables and the picture anew, without measuring
"""

if __name__ == "__main__":  # processes that measure import this file, and nothing with it
    from benchmarks.speed.command import app

    app()
