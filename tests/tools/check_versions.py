"""Runs the tests with a set of package versions, in a virtual environment of its own.

    python tests/tools/check_versions.py NAME

NAME is one of SETS: "oldest" is the set that requirements.txt asks for at least, "colab" what
Colab and Kaggle had in 2025.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "oldest": "tensorflow==2.18.0 keras==3.7.0 pandas==2.2.1 numpy==1.26.4 scipy==1.13.0"
    " matplotlib==3.9.0 seaborn==0.13.2 scikit-learn==1.5.0",
    "colab": "tensorflow==2.18.0 keras==3.8.0 pandas==2.2.2 numpy==2.0.2 scipy==1.14.1"
    " matplotlib==3.10.0 seaborn==0.13.2 scikit-learn==1.6.1",
}


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    packages = SETS[sys.argv[1]].split()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        requirements = ["-r", "tests/requirements.txt"]
        install = [python, "-m", "pip", "install", "--quiet", *packages, *requirements]
        subprocess.run(install, cwd=ROOT, check=True)
        sys.exit(subprocess.run([python, "-m", "pytest"], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
