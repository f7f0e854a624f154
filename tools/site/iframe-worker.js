// Search runs in a worker, which browsers refuse to load from a folder. There, and nowhere else, a hidden frame takes its place.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.loaded = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          this.frame.onload = null
          const inner = this.frame.contentWindow
          inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = inner.document.createElement("script")
          script.src = new URL(url, location)
          script.onload = () => resolve(inner)
          script.onerror = reject
          inner.document.body.append(script)
        }
      })
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.loaded.then(inner => inner.dispatchEvent(new inner.MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
