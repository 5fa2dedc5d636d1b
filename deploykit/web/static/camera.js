// The camera, asked for only when a person wants it.

import { Refusal } from "./refusal.js";

const WHY = {
  NotAllowedError: "The camera was not allowed; allow it for this page.",
  NotFoundError: "There is no camera.",
  NotReadableError: "The camera is used by another program.",
};

/** Show the camera in a <video>; it takes what looks away from the person where there is a choice. */
export async function startCamera(video) {
  if (!navigator.mediaDevices) throw new Refusal("A browser lends the camera only to pages of https or of this machine.");
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Refusal(WHY[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
  await video.play();
}

/** Give the camera back. */
export function stopCamera(video) {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}
