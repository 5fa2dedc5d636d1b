// The camera, asked for only when a person wants it.

import { Refusal } from "./refusal.js";

const WHY = {
  NotAllowedError: "The camera was not allowed; allow it for this page.",
  NotFoundError: "There is no camera.",
  NotReadableError: "The camera is used by another program.",
};

let turn = 0; // of the newest wish; a camera that comes for an older one is given back at once

/**
 * Show the camera in a <video>; it takes what looks away from the person where there is a choice.
 *
 * Returns whether it is on: not where it was stopped, or asked for again, in the meantime.
 */
export async function startCamera(video) {
  if (!navigator.mediaDevices) throw new Refusal("A browser lends the camera only to pages of https or of this machine.");
  const mine = ++turn;
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (mine === turn) {
      video.srcObject = stream;
      await video.play();
    }
  } catch (error) {
    if (mine === turn) {
      release(stream);
      video.srcObject = null;
      throw new Refusal(WHY[error.name] ?? `The camera cannot be used: ${error.message}`);
    }
  }
  if (mine !== turn) release(stream);
  return mine === turn;
}

/** Give the camera back. */
export function stopCamera(video) {
  turn++;
  release(video.srcObject);
  video.srcObject = null;
}

const release = (stream) => stream?.getTracks().forEach((track) => track.stop());
