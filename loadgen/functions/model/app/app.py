"""A model server: scikit-learn's digits, a support vector classifier trained at start-up, Flask in front.

In: ``GET /predict?row=N``. Out: JSON with the class predicted for sample N and a checksum of the sample. gunicorn
loads this once (``--preload``) and forks its workers from it, so that the token is the same in all of them.
"""

import itertools
import os
import zlib

from flask import Flask, jsonify, request
from sklearn.datasets import load_digits
from sklearn.svm import SVC

TOKEN = os.urandom(16).hex()

digits = load_digits()
classifier = SVC(gamma=0.001, C=100.0).fit(digits.data, digits.target)
counter = itertools.count(1)

app = Flask(__name__)


@app.get("/ready")
def ready():
    return jsonify(ready=True)


@app.get("/predict")
def predict():
    row = request.args.get("row", 0, type=int)
    if row < 0:
        return jsonify(error="GET /predict?row=N, N = 0, 1, 2, …"), 404
    sample = digits.data[row % len(digits.data)]
    value = f"{classifier.predict([sample])[0]}-{zlib.crc32(sample.tobytes()):08x}"
    return jsonify(function="model", token=TOKEN, row=row, value=value, count=next(counter))
