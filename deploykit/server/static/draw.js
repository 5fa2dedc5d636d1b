// A field to draw in, white on black as the pictures are that digits are learned from.

const STROKE = 0.1; // of the field's side

/**
 * Let a person draw in a canvas.
 *
 * `drawn` gets the picture as a PNG after every stroke. With `centred` what is drawn is moved into
 * the middle and enlarged, so that its longer side takes the share `fill` of the picture.
 */
export function drawing(canvas, drawn) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pad = { fill: 1, centred: true, clear };
  let last = null; // where the stroke under way is

  function clear() {
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  function line(to) {
    context.strokeStyle = "white";
    context.lineWidth = STROKE * canvas.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...to); // to the same point: a dot
    context.stroke();
    last = to;
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    line(last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last && event.isPrimary) (event.getCoalescedEvents?.() ?? [event]).forEach((one) => line(at(one)));
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => {
      if (!last || !event.isPrimary) return;
      last = null;
      (pad.centred ? centre(canvas, context, pad.fill) : canvas).toBlob(drawn, "image/png");
    });
  }
  clear();
  return pad;
}

/** Return a copy in which the drawn part is in the middle. */
function centre(canvas, context, fill) {
  const { left, top, right, bottom } = bounds(context.getImageData(0, 0, canvas.width, canvas.height));
  const [width, height] = [right - left, bottom - top];
  const scale = (fill * canvas.width) / Math.max(width, height);
  const copy = document.createElement("canvas");
  copy.width = copy.height = canvas.width;
  const paint = copy.getContext("2d");
  paint.fillStyle = "black";
  paint.fillRect(0, 0, copy.width, copy.height);
  const [x, y] = [(copy.width - scale * width) / 2, (copy.height - scale * height) / 2];
  paint.drawImage(canvas, left, top, width, height, x, y, scale * width, scale * height);
  return copy;
}

/** Return the box around what is not black. */
function bounds({ data, width, height }) {
  const box = { left: width, top: height, right: 0, bottom: 0 };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[4 * (y * width + x)] < 128) continue;
      box.left = Math.min(box.left, x);
      box.right = Math.max(box.right, x + 1);
      box.top = Math.min(box.top, y);
      box.bottom = Math.max(box.bottom, y + 1);
    }
  }
  return box;
}
